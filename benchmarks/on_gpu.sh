#!/usr/bin/env bash
# Everything that wants a GPU, in one command: at most 10 minutes on one card, 15 on several.
#
#     benchmarks/on_gpu.sh [--quick] [FOLDER]
#
# Tests of one device, of several where there are cards, then the layer, the step, bf16, compile, peak memory and a
# checkpoint's stall on one card, and expert parallelism over all of them. FOLDER (build/on_gpu) gets measured.json and
# on_gpu.md, which has the counted figures beside the measured ones and the card's name. --quick shows in a minute, on a
# CPU too, that all of it runs. What takes longer than its limit is ended and said to be; the exit code is 1 where a part
# failed, after all parts have run.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="${PWD}${PYTHONPATH:+:${PYTHONPATH}}"

quick=()
if [[ ${1:-} == --quick ]]; then
    quick=(--quick)
    shift
fi
folder=$(realpath -m "${1:-build/on_gpu}")
mkdir -p "${folder}"
rm -f "${folder}"/{measured,experts}.json "${folder}"/on_gpu.md "${folder}"/tests_*.txt
failed=0

# part NAME SECONDS COMMAND...: its output goes to FOLDER/NAME.txt
part() {
    local name=$1 limit=$2 code=0
    shift 2
    printf '%s, at most %d s ...\n' "${name}" "${limit}"
    timeout --signal INT --kill-after 40 "${limit}" "$@" > "${folder}/${name}.txt" 2>&1 || code=$?
    ((code == 124)) && printf '\nended after %d s, its limit\n' "${limit}" >> "${folder}/${name}.txt"
    ((code == 0 || code == 124)) || { failed=1 && tail -n 20 "${folder}/${name}.txt" >&2; }
}

cards=$(python -c 'import torch; print(torch.accelerator.device_count() if torch.accelerator.is_available() else 0)')
printf '%s accelerators\n' "${cards}"
workers=$(python -c 'import os; print(min(os.cpu_count() or 1, 16))') # each a context on the card
tests=(python -m pytest tests -v -p no:cacheprovider) # -v: what was reached within the limit has its result
if [[ ${#quick[@]} -gt 0 ]]; then
    part tests_single_gpu 60 python -m pytest -q -p no:cacheprovider -m single_gpu tests/moe/test_gating.py
else
    part tests_single_gpu 240 "${tests[@]}" -n "${workers}" --dist worksteal -m single_gpu
    ((cards > 1)) && part tests_multi_gpu 180 "${tests[@]}" -m multi_gpu
fi
if ((cards > 1)) || [[ ${#quick[@]} -gt 0 ]]; then
    part experts 120 torchrun --standalone --nproc_per_node "$((cards > 1 ? cards : 2))" benchmarks/on_device.py \
        "${folder}" --only experts "${quick[@]}"
fi
part measured 320 python benchmarks/on_device.py "${folder}" "${quick[@]}"
if [[ -f ${folder}/on_gpu.md ]]; then
    cat "${folder}/on_gpu.md"
else
    failed=1
fi
exit "${failed}"
