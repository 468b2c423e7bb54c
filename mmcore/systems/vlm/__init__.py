"""Any image-text-to-text model of transformers, with its own processor and chat template."""

RECIPES = {"vlm": "recipe:Vlm"}
PROOFS = {"vlm": "recipe:PROOF"}
PLANS = {"vlm": "plan:VlmPlan"}
FOLDERS = {"idefics3": "weights:load_reading_model"}
KINDS = ("idefics3", "smolvlm", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3", "llava_onevision")
CHATS = dict.fromkeys(KINDS, "talk:model_of_folder")
