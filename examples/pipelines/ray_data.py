"""Bits per byte of a Ray Data set: the workers open the model again by its path, and share its weights."""

import sys

import ray

import pyrformer as pf

model = pf.load(sys.argv[1])


def bits_per_byte(batch):
    return {**batch, "bits": model.score(list(batch["text"])).bits_per_byte}


ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
texts = ["My lord, the king is come.", "zqxj vvkw", "Good night, sweet prince."]
scored = ray.data.from_items([{"text": text} for text in texts]).map_batches(bits_per_byte)
for row in sorted(scored.take_all(), key=lambda row: row["bits"]):
    print(f"{row['bits']:.2f}  {row['text']}")
