#!/usr/bin/env bash
# One training run on a plain list of hosts: on each, over ssh, torchrun starts the ranks. The hosts need the same
# folder at the same path, this environment in it, and an ssh without a password from here.
#   scripts/cluster/hosts.sh [--print] [--gpus N] [--port P] HOSTS KEY=VALUE...
# HOSTS is a file with one host a line; the first one is where the ranks meet. --gpus: ranks of a host, default 1.
# --print shows the commands and runs nothing. PYTHON: the interpreter on the hosts, default python3.
set -euo pipefail

fail() { echo "hosts.sh: $1" >&2; exit 2; }

print=false gpus=1 port=29500
while [ $# -gt 0 ]; do
  case $1 in
    --print) print=true; shift ;;
    --gpus) gpus=${2:?}; shift 2 ;;
    --port) port=${2:?}; shift 2 ;;
    -*) fail "no such option $1; there are --print, --gpus and --port" ;;
    *) break ;;
  esac
done
[ $# -ge 1 ] && [ -r "$1" ] || fail "needs a file with one host a line, got ${1:-nothing}"
[[ $gpus =~ ^[1-9][0-9]*$ ]] || fail "--gpus: must be a whole number of at least 1, got $gpus"
[[ $port =~ ^[1-9][0-9]*$ ]] || fail "--port: must be a number, got $port"

hosts=()
while read -r host _; do
  case $host in '' | '#'*) continue ;; esac
  # a name that began with - would be an option of ssh
  [[ $host =~ ^[A-Za-z0-9_][A-Za-z0-9_.@:-]*$ ]] || fail "$1: must hold names of hosts, got $host"
  hosts+=("$host")
done <"$1"
shift
[ ${#hosts[@]} -gt 0 ] || fail "the file of hosts is empty"

meeting=${hosts[0]#*@}
run=(
  "${PYTHON:-python3}" -m torch.distributed.run "--nnodes=${#hosts[@]}" "--nproc-per-node=$gpus"
  --rdzv-backend=c10d "--rdzv-endpoint=$meeting:$port" "--rdzv-id=attnzoo-$$" -m attnzoo.cli train "$@"
)
command="cd $(printf %q "$PWD") && exec env$(printf ' %q' OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" "${run[@]}")"
if $print; then
  for host in "${hosts[@]}"; do echo "ssh -tt $host $(printf %q "$command")"; done
  exit 0
fi

# With a terminal (-tt), ranks end when the connection does.
children=()
stop() { kill "${children[@]}" 2>/dev/null || true; }
trap stop INT TERM EXIT
for host in "${hosts[@]}"; do
  ssh -tt -o BatchMode=yes "$host" "$command" </dev/null &
  children+=($!)
done
code=0
for child in "${children[@]}"; do
  wait "$child" || { ended=$?; [ "$code" -ne 0 ] || code=$ended; }
done
trap - EXIT
exit "$code"
