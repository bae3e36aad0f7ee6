"""A loop of one's own over a network of timm: python examples/loop_timm.py photos.kd gen resnet10t 10

Every pass over the loader is the next epoch, with the views that the teacher saw and what it said of them.
"""

import sys
from pathlib import Path

import timm
import torch
from torch.nn.functional import cross_entropy, kl_div

import kdcli

TEMPERATURE = 2.0


def main(path: Path, teacher: str, architecture: str, epochs: int) -> None:
    cache = kdcli.open_cache(path)
    student = timm.create_model(architecture, num_classes=len(cache.class_names or ()))
    loader = cache.loader(student=student, teachers={teacher: ["logits"]}, batch_size=32, workers=0)

    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    for epoch in range(epochs):
        total = 0.0
        for batch in loader:
            logits = student(batch["image"])
            soft = (batch["teacher"][teacher]["logits"].float() / TEMPERATURE).log_softmax(1)
            distilled = kl_div(
                (logits / TEMPERATURE).log_softmax(1), soft, log_target=True, reduction="batchmean"
            )
            loss = cross_entropy(logits, batch["label"], ignore_index=-1) + TEMPERATURE**2 * distilled
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(logits)
        print(f"epoch {epoch + 1}: loss {total / len(loader.dataset):.4f}", flush=True)


if __name__ == "__main__":  # decode processes are started where the platform spawns them
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
