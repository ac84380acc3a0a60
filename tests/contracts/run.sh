#!/bin/sh
# The contracts on the installed vLLM and on other releases of it: `run.sh VERSION...`. What is in .vllm/ already is not
# loaded again. Ends with the first that does not fit.
set -eu

python=.venv/bin/python
# No release looks for a GPU here, nor for a model.
export VLLM_TARGET_DEVICE=cpu HF_HUB_OFFLINE=1

echo "the installed vLLM"
$python -m pytest --quiet tests/contracts
for version in "$@"; do
    directory=$($python -m tests.contracts.install "$version")
    echo "vLLM $version"
    PYTHONPATH="$directory" JUSTITIA_CONTRACT="$version" $python -m pytest --quiet tests/contracts
done
