"""A column of bits per byte in a polars frame, and the rows whose text the model finds least surprising."""

import sys

import polars as pl

import pyrformer as pf

model = pf.load(sys.argv[1])


def bits_per_byte(texts: pl.Series) -> pl.Series:
    return pl.Series(model.score(texts).bits_per_byte)


frame = pl.LazyFrame({"text": ["My lord, the king is come.", "zqxj vvkw", "Good night, sweet prince."]})
scored = frame.with_columns(bits=pl.col("text").map_batches(bits_per_byte, return_dtype=pl.Float64))
print(scored.sort("bits").collect())

# All columns at once: results are Arrow tables.
print(pl.DataFrame(model.score(["To be, or not to be"])))
