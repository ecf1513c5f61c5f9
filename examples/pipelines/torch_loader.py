"""Tokenized batches by a PyTorch DataLoader with worker processes, and their loss by the model."""

import sys

import numpy as np
import torch
from torch.utils.data import DataLoader

import pyrformer as pf

model = pf.load(sys.argv[1])
tokenizer = model.tokenizer


def collate(texts: list[str]) -> dict[str, torch.Tensor]:
    ids = tokenizer.encode_batch(texts)
    padded = np.zeros((len(ids), int(np.diff(ids.offsets).max())), np.int64)
    mask = np.zeros_like(padded)
    for i in range(len(ids)):
        padded[i, : len(ids[i])], mask[i, : len(ids[i])] = ids[i], 1
    return {"input_ids": torch.from_dlpack(padded), "attention_mask": torch.from_dlpack(mask)}


if __name__ == "__main__":
    texts = ["My lord, the king is come.", "Good night, sweet prince.", "Enter three witches."] * 4
    for batch in DataLoader(texts, batch_size=4, num_workers=2, collate_fn=collate):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        print(model(ids, mask, labels=ids.masked_fill(mask == 0, -100)).loss)
