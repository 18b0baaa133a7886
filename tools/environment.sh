# Sourced with a requirements file: makes .venv if there is none and installs what the file lists,
# in the versions that the tests ran with. Leaves the shell in the repository's root with .venv's commands first.
# VERSIONS=older takes .venv-older and tests/constraints-older.txt instead.
set -euo pipefail
requirements=$1
venv=.venv${VERSIONS:+-$VERSIONS} constraints=tests/constraints${VERSIONS:+-$VERSIONS}.txt
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -d "$venv" ] || "${PYTHON:-python3}" -m venv "$venv"
export PATH="$PWD/$venv/bin:$PATH"

if ! python -c "import torch" 2>/dev/null; then
    torch=$(grep '^torch==' "$constraints")
    echo "Installing $torch"
    # On Linux the default build brings gigabytes of CUDA packages; without a GPU take the CPU build, from where pip
    # is set up to find it or from where uv knows it to be.
    if [ "$(uname)" = Linux ] && ! nvidia-smi >/dev/null 2>&1; then
        pip install --quiet "$torch+cpu" 2>/dev/null ||
            { pip install --quiet uv && uv pip install --quiet --python "$venv" --torch-backend cpu "$torch"; }
    else
        pip install --quiet "$torch"
    fi
fi
echo "Installing $requirements"
pip install --quiet -r "$requirements" -c "$constraints"
