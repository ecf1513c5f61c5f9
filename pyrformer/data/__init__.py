"""From files to batches: documents, read and cleaned (:mod:`.documents`); text tokenized once (:mod:`.prepared`, by a
cluster in :mod:`.cluster`); ids as batches (:mod:`.batches`); texts with classes, tagged words, pairs of texts."""
