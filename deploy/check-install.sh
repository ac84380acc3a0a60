#!/bin/sh
# Runs the pip lines of deploy/Dockerfile, as they stand there, in a fresh virtual environment that is deleted at the end.
#   deploy/check-install.sh cpu     installs (about 3.5 GB), imports, asks `justitia` for its help
#   deploy/check-install.sh gpu     resolves and installs nothing (pip's --dry-run)
# Run it with the Python of the image. PYTHON names another than `python3`, TMPDIR another place.
set -eu
kind=${1:-}
case $kind in cpu|gpu) ;; *) echo "usage: $0 cpu|gpu" >&2; exit 2 ;; esac
cd "$(dirname "$0")/.."

venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
trap 'exit 130' INT TERM
"${PYTHON:-python3}" -m venv "$venv"
PATH=$venv/bin:$PATH

# Each RUN line of the stages that make this image and that calls pip, continuation lines joined.
lines=$(awk -v stage="engine-$kind" '
    /\\$/ { sub(/\\$/, ""); held = held $0; next }
    { line = held $0; held = "" }
    line ~ /^FROM/ { split(line, word, " "); name = word[4]; next }
    line ~ /^RUN pip / && (name == "base" || name == stage || name == "") { sub(/^RUN /, "", line); print line }
' deploy/Dockerfile)
if [ "$(printf '%s\n' "$lines" | wc -l)" -lt 2 ]; then echo "no pip lines found in deploy/Dockerfile" >&2; exit 1; fi
if [ "$kind" = gpu ]; then lines=$(printf '%s\n' "$lines" | sed 's/^pip install /pip install --dry-run --quiet /'); fi

printf '%s\n' "$lines" | while IFS= read -r line; do
    echo "+ $line"
    sh -euc "$line" </dev/null
done

if [ "$kind" = cpu ]; then
    cd "$venv"
    python -c 'import torch, transformers, vllm; print("torch", torch.__version__, "vllm", vllm.__version__)'
    justitia --help >/dev/null
    du -sh "$venv" | sed 's/\t.*//; s/^/installed: /'
fi
echo "deploy/Dockerfile's pip lines hold for $kind"
