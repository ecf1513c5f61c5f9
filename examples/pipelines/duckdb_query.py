"""A model as a function in SQL: DuckDB hands over whole columns as Arrow arrays."""

import sys

import duckdb
import pyarrow as pa

import pyrformer as pf

model = pf.load(sys.argv[1])


def bits_per_byte(texts: pa.ChunkedArray) -> pa.Array:
    return pa.array(model.score(texts).bits_per_byte)


db = duckdb.connect()
db.create_function("bits_per_byte", bits_per_byte, ["VARCHAR"], "DOUBLE", type="arrow")
db.execute(
    "CREATE TABLE lines AS SELECT unnest(['My lord, the king is come.', 'zqxj vvkw', 'Good night.']) AS line"
)
print(db.execute("SELECT line, bits_per_byte(line) AS bits FROM lines ORDER BY bits").fetchall())
