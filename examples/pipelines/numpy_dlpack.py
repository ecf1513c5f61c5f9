"""Vectors of texts without a copy: numpy arrays speak DLPack, and Arrow wraps their memory."""

import sys

import numpy as np
import pyarrow as pa

import pyrformer as pf

model = pf.load(sys.argv[1])
vectors = model.embed(["My lord, the king is come.", "Good night, sweet prince."])  # float32 [N, C]

again = np.from_dlpack(vectors)  # so do jax.dlpack.from_dlpack, torch.from_dlpack, cupy.from_dlpack
assert np.shares_memory(again, vectors)

column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
print(pa.table({"vector": column}).schema)
print("cosine", float(vectors[0] @ vectors[1]))
