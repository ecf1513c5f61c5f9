"""A model in `datasets.Dataset.map` with two processes: each opens the model by its path."""

import sys

import datasets

import pyrformer as pf

model = pf.load(sys.argv[1], threads=1)


def score(rows: dict[str, list[str]]) -> dict[str, object]:
    scores = model.score(rows["text"])
    return {"bits": scores.bits_per_byte, "tokens": scores.tokens}


if __name__ == "__main__":
    texts = ["My lord, the king is come.", "zqxj vvkw", "Good night, sweet prince.", "Enter three witches."]
    data = datasets.Dataset.from_dict({"text": texts}).map(score, batched=True, num_proc=2)
    for row in data.sort("bits"):
        print(row)
