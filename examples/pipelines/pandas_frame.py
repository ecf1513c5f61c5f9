"""A column of bits per byte in a pandas frame."""

import sys

import pandas as pd

import pyrformer as pf

model = pf.load(sys.argv[1])
frame = pd.DataFrame({"text": ["My lord, the king is come.", "zqxj vvkw", "Good night, sweet prince."]})
frame = frame.assign(bits=lambda rows: model.score(rows["text"]).bits_per_byte)
print(frame.sort_values("bits"))
