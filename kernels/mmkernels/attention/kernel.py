from mmkernels.attention.blockwise import attention_bwd, attention_fwd

__all__ = ["attention_bwd", "attention_fwd"]
