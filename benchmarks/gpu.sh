#!/usr/bin/env bash
# Builds, tests and times everything that needs a GPU, on a machine that has one and no network.
#
#   bash benchmarks/gpu.sh [--dry] OUT
#
#   OUT     folder of what comes out: gpu.log, gpu-parts.json, and the JSON of each benchmark
#   --dry   everything but the device: builds without CUDA, collects the GPU tests, and runs every
#           benchmark's checks on the CPU without a time
#   PYTHON  that has torch and transformers (default: python3)
#   WHEELS  folder with wheels of what that Python lacks, such as diffusers (default: none)
#   LIMIT   seconds for all of it (default: 530, with --dry 1200)
#
# The most valuable parts come first. Each has its own time limit, so that one that hangs loses only
# itself; what a part wrote until then stays. `python benchmarks/report.py --write` puts the JSON,
# copied to benchmarks/results/, into the README. Exit status: 1 if any part failed.
set -uo pipefail

dry=
[[ ${1:-} == --dry ]] && dry=--dry && shift
[[ $# == 1 ]] || { echo "usage: bash benchmarks/gpu.sh [--dry] OUT" >&2; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
limit=${LIMIT:-$([[ -n $dry ]] && echo 1200 || echo 530)}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
log=$out/gpu.log failed=0 rows=()
: >"$log"

part() { # name, seconds, command...
  local name=$1 most=$2 begun=$SECONDS status seconds
  shift 2
  ((most < limit - SECONDS)) || most=$((limit - SECONDS))
  printf '\n==== %s\n' "$name" >>"$log"
  if ((most < 5)); then
    status=124
  else
    timeout -k 5 "$most" "$@" >>"$log" 2>&1 </dev/null
    status=$?
  fi
  seconds=$((SECONDS - begun))
  ((status == 0)) || failed=1
  printf '%-10s %4d s  %s\n' "$name" "$seconds" \
    "$( ((status == 0)) && echo ok || { ((status == 124)) && echo "out of time" || echo "FAILED ($status)"; })" |
    tee -a "$log"
  rows+=("\"$name\": {\"seconds\": $seconds, \"status\": $status}")
  (IFS=, && printf '{%s}\n' "${rows[*]}") >"$out/gpu-parts.json"
  return "$status"
}

wheels() {
  shopt -s nullglob
  local found=("${WHEELS:-/nonexistent}"/*.whl)
  ((${#found[@]} == 0)) ||
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "${found[@]}"
}

build() {
  # Machine code for this GPU alone: half the time of the build for all.
  export DREAMREADER_EXT=cuda DREAMREADER_CUDA_ARCHS=$1
  [[ -n $dry ]] && export DREAMREADER_EXT=cpu
  "$python" setup.py -q build_ext --inplace && "$python" -m dreamreader doctor
}

sanitize() { # one tool of compute-sanitizer over every operator on small inputs
  if [[ -n $dry ]]; then
    "$python" benchmarks/gpu.py --check --rows 64 --width 96
    return
  fi
  compute-sanitizer --tool "$1" --error-exitcode 9 --kernel-name-exclude kns=at:: \
    "$python" benchmarks/gpu.py --check --rows 64 --width 96
}

export -f wheels build sanitize
export python site dry
arch=$("$python" -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}{b}" + "a" * (a == 9) + "-real")' 2>/dev/null || echo 90a-real)

part wheels 30 bash -c wheels
part build $([[ -n $dry ]] && echo 600 || echo 220) bash -c "build $arch"
part tests 110 "$python" -m pytest -m gpu -q -p no:cacheprovider tests
part ops 50 "$python" benchmarks/gpu.py ${dry:+--check --rows 512} --output "$out/gpu-ops.json"
part edits 50 "$python" benchmarks/gpu_edits.py ${dry:+--check} --output "$out/gpu-edits.json"
part sae 75 "$python" benchmarks/gpu_sae.py ${dry:+--check} --output "$out/gpu-sae.json"
part memcheck 60 bash -c "sanitize memcheck"
part racecheck 60 bash -c "sanitize racecheck"
if [[ -z $dry ]]; then
  part harvest 40 "$python" benchmarks/harvest.py --device cuda --rounds 3 --output "$out/gpu-harvest.json"
  part engine 40 "$python" benchmarks/engine.py --device cuda --rounds 3 --output "$out/gpu-engine.json"
  part visits 30 "$python" benchmarks/visits.py --device cuda --rounds 5 --output "$out/gpu-visits.json"
fi
printf 'all %d s, log in %s\n' "$SECONDS" "$log"
exit "$failed"
