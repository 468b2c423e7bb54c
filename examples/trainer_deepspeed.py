"""transformers' CLIPModel under Trainer and DeepSpeed, with the contrastive loss of all ranks' batches by one line.

    torchrun --nproc_per_node 2 examples/trainer_deepspeed.py [--steps 60]
    deepspeed --num_gpus 8 examples/trainer_deepspeed.py

Without that line CLIPModel compares each rank's pairs with that rank's alone. The data are scans of handwritten digits
with captions; prints the zero-shot accuracy on held-out scans. On a CPU DeepSpeed first compiles an all-reduce.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, Trainer, TrainingArguments

from mmcore.integrations.contrastive import use_global_loss

WORDS = "a photo of the number zero one two three four five six seven eight nine <end>".split()
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
END = len(WORDS) - 1
TEXT = SMALL | {"vocab_size": len(WORDS), "max_position_embeddings": 7, "bos_token_id": 0, "eos_token_id": END}
VISION = SMALL | {"image_size": 8, "patch_size": 4, "num_channels": 1}


def captions(labels: Tensor) -> Tensor:
    """`a photo of the number seven <end>` as places in WORDS, [B, 7]."""
    count = len(labels)
    return torch.cat([torch.arange(5).expand(count, -1), 5 + labels[:, None], torch.full((count, 1), END)], 1)


def collate(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    images, texts = (torch.stack(x) for x in zip(*samples))
    return {"pixel_values": images, "input_ids": texts, "return_loss": True}


def main(steps: int, out: str) -> None:
    digits: Any = load_digits()
    images, labels = torch.tensor(digits.images[:, None]).float() / 8 - 1, torch.tensor(digits.target)
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=64))
    use_global_loss(model)  # the one line
    arguments = TrainingArguments(
        out,
        max_steps=steps,
        per_device_train_batch_size=64,
        learning_rate=2e-3,
        warmup_steps=5,
        deepspeed=str(Path(__file__).with_name("deepspeed_zero2.json")),
        use_cpu=not torch.cuda.is_available(),
        logging_steps=20,
        report_to="none",
        save_strategy="no",
    )
    pairs = list(zip(images[:1400], captions(labels[:1400])))
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=pairs)  # pyright: ignore[reportArgumentType]
    trainer.train()
    if trainer.is_world_process_zero():
        with torch.no_grad():
            inputs = {"pixel_values": images[1400:], "input_ids": captions(torch.arange(10))}
            output = model.eval()(**{name: x.to(model.device) for name, x in inputs.items()})
        right = output.logits_per_image.argmax(1).cpu() == labels[1400:]
        print(f"zero-shot accuracy on {len(right)} held-out scans: {right.float().mean():.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    with TemporaryDirectory() as folder:
        main(parser.parse_args().steps, folder)
