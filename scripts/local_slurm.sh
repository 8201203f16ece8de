#!/usr/bin/env bash
# A real SLURM of one node on this machine, from Debian's or Ubuntu's packages: what tests/test_slurm.py submits to.
# Needs root and apt. Does nothing where a SLURM answers already.
#   scripts/local_slurm.sh [CPUS]        CPUS: that the node claims to have; default: at least 2
set -euo pipefail

answers() { command -v sinfo >/dev/null && sinfo --noheader >/dev/null 2>&1; }
runs() { pidof "$1" >/dev/null; }
fail() { echo "local_slurm: $1" >&2; exit 1; }

if answers; then exit 0; fi
if [ "$(id -u)" -ne 0 ]; then fail "needs root"; fi

if ! command -v slurmctld >/dev/null || ! command -v munged >/dev/null; then
  command -v apt-get >/dev/null || fail "needs apt-get, or slurmctld, slurmd and munged"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    munge slurmctld slurmd slurm-client >/dev/null
fi

node=$(hostname -s)
cores=$(nproc)
cpus=${1:-$((cores > 2 ? cores : 2))}

# munge: SLURM's programs sign what they tell each other with this key
mkdir -p /run/munge /var/log/munge /var/lib/munge /etc/munge
if [ ! -s /etc/munge/munge.key ]; then (umask 077; head -c 1024 /dev/urandom > /etc/munge/munge.key); fi
chown -R munge: /run/munge /var/log/munge /var/lib/munge /etc/munge
chmod 755 /run/munge
runs munged || su munge -s /bin/sh -c munged

# slurmd refuses a node that has fewer cores than it claims, unless told that the configuration decides
mkdir -p /etc/slurm /var/log/slurm /var/spool/slurmctld /var/spool/slurmd
cat > /etc/slurm/slurm.conf <<CONF
ClusterName=local
SlurmctldHost=$node(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
StateSaveLocation=/var/spool/slurmctld
SlurmdSpoolDir=/var/spool/slurmd
SlurmctldLogFile=/var/log/slurm/slurmctld.log
SlurmdLogFile=/var/log/slurm/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
NodeName=$node NodeAddr=127.0.0.1 CPUs=$cpus State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
runs slurmctld || slurmctld -i
runs slurmd || slurmd

for _ in $(seq 60); do
  if sinfo --noheader --states=idle --format=%D 2>/dev/null | grep -q '[1-9]'; then exit 0; fi
  sleep 0.25
done
fail "no idle node after 15 seconds; see sinfo, and the logs of slurmctld and slurmd in /var/log/slurm"
