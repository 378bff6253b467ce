#!/usr/bin/env bash
# Builds the virtual environment of NVIDIA Dynamo 1.6.1's frontend and mocker: bench/setup_dynamo.sh DIRECTORY
set -euo pipefail
venv=${1:?usage: bench/setup_dynamo.sh DIRECTORY}
[ -e "$venv/dynamo.installed" ] && exit
"$("$(dirname "${BASH_SOURCE[0]}")/../scripts/python")" -m venv "$venv"
pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" ai-dynamo-runtime==1.6.1
"${pip[@]}" --no-deps ai-dynamo==1.6.1  # its dependency aisimulate is not on the index; frontend and mocker do without
"${pip[@]}" aiohttp 'kubernetes<33,>=32.0.1' msgspec prometheus-client pyzmq redis tqdm transformers tokenizers zstandard uvloop
touch "$venv/dynamo.installed"
