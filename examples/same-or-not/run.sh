#!/usr/bin/env bash
# The run of docs/same-or-not.md: three models learn from the same text and the same tokens, then they are compared.
# Needs the pyrformer command on the path; writes to runs/same-or-not, or to the folder given.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
text=$here/../shakespeare
out=${1:-runs/same-or-not}
mkdir -p "$out"

pyrformer tokenizer train "$text/train.txt" --preset bert-uncased --vocab-size 512 --out "$out/tokenizer.json"
for name in gpt bert xlnet; do
  pyrformer train "$text/train.txt" --valid "$text/valid.txt" --config "$here/$name.toml" \
    --tokenizer "$out/tokenizer.json" --out "$out/$name" --overwrite
done

echo; echo "== what each knows of a held-out text"
for name in gpt bert xlnet; do
  echo; echo "$name"
  pyrformer eval "$out/$name" "$text/valid.txt" --limit 20000
done

echo; echo "== side by side"
pyrformer compare "$out/gpt" "$out/bert" "$text/valid.txt" --limit 20000 --spans 500
pyrformer compare "$out/gpt" "$out/xlnet" "$text/valid.txt" --limit 20000 --spans 500

echo; echo "== going on with a text: the autoregressive model's work"
pyrformer sample "$out/gpt" "my lord," --max-new-tokens 40 --seed 1

echo; echo "== filling a gap: the masked model's work"
pyrformer fill-mask "$out/bert" "what is the [MASK], my lord?"

echo; echo "== what each is good for"
"${PYTHON:-python3}" "$here/uses.py" "$out" "$text/valid.txt"

for name in gpt bert xlnet; do
  pyrformer explain "$out/$name" "what is the matter, my lord?" --out "$out/$name.html"
done
