#!/bin/sh
# Writes the locks of the images anew: every dependency, one version, with the hashes of its files. Needs uv.
#
#   bot.lock         the adapters, for every processor
#   worker.lock      the worker but torch, for every processor
#   torch-cpu.lock   torch without CUDA, from PyTorch's own index, for x86-64
#   torch-cuda.lock  torch with CUDA and the libraries that it brings along, for x86-64
set -eu
cd "$(dirname "$0")/../.."
here=docker/locks
torch=2.13.0
options="--quiet --upgrade --generate-hashes --no-annotate --no-header --python-version 3.11"

uv pip compile pyproject.toml --extra discord --extra telegram $options --universal -o $here/bot.lock

made=$(mktemp -d)
trap 'rm -r "$made"' EXIT
echo "torch==$torch" >"$made/torch"
uv pip compile "$made/torch" $options --python-platform x86_64-manylinux_2_28 -o "$made/cuda"
uv pip compile pyproject.toml --extra model -c "$made/torch" $options --universal -o "$made/worker"
# One paragraph of a lock is one package: torch and what is only CUDA's go to torch-*.lock.
split() { awk -v keep="$1" '/^[a-z]/ { cuda = /^(torch|triton|nvidia-|cuda-)/; on = (keep == "cuda") == cuda } on' "$2"; }
split rest "$made/worker" >$here/worker.lock
split cuda "$made/cuda" >$here/torch-cuda.lock

index=https://download.pytorch.org/whl/cpu
echo "torch==$torch+cpu" >"$made/cpu"
uv pip compile "$made/cpu" $options --no-deps --python-platform x86_64-manylinux_2_28 --default-index $index -o "$made/torch"
{ echo "--index-url $index"; cat "$made/torch"; } >$here/torch-cpu.lock
