#!/bin/bash
# Run commands with a Slurm cluster of one node, this machine, around them; the cluster ends with them.
# Needs Debian and root; installs Slurm where it is missing.
#   tests/slurm.sh .venv/bin/python experiment.py --cluster slurm --device cpu --seeds 0 1
#   tests/slurm.sh .venv/bin/python -m pytest tests/test_engine.py -k slurm
set -euo pipefail

[ "$(id -u)" = 0 ] || { echo "error: tests/slurm.sh must run as root" >&2; exit 2; }
[ $# -gt 0 ] || { echo "error: name the command to run: tests/slurm.sh COMMAND..." >&2; exit 2; }
if ! command -v slurmctld slurmd sbatch munged >/dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        slurmctld slurmd slurm-client munge >/dev/null
fi
if scontrol ping >/dev/null 2>&1; then
    echo "error: a Slurm cluster answers already: run the command itself" >&2
    exit 2
fi

scratch=$(mktemp -d) host=$(hostname -s) own_munge=""
export SLURM_CONF=$scratch/slurm.conf

stop() {
    scancel --user root 2>/dev/null || true
    for _ in $(seq 40); do # a job's last process outlives its result a little
        [ -n "$(squeue --noheader 2>/dev/null)" ] || break
        sleep 1
    done
    for daemon in d ctl $own_munge; do
        [ -f "$scratch/$daemon.pid" ] && kill "$(cat "$scratch/$daemon.pid")" 2>/dev/null
    done
    sleep 1
    rm -rf "$scratch"
}
trap stop EXIT

if ! munge -n 2>/dev/null | unmunge >/dev/null 2>&1; then
    own_munge=munge
    [ -s /etc/munge/munge.key ] || dd if=/dev/urandom of=/etc/munge/munge.key bs=1024 count=1 status=none
    chown munge: /etc/munge/munge.key
    chmod 400 /etc/munge/munge.key
    mkdir -p /run/munge
    chown munge: /run/munge
    chmod 755 "$scratch"
    mkdir "$scratch/munge"
    chown munge: "$scratch/munge"
    # setpriv becomes munged itself, so no login shell is needed for the munge user
    setpriv --reuid munge --regid munge --clear-groups munged --pid-file "$scratch/munge/munge.pid"
    ln -s munge/munge.pid "$scratch/munge.pid"
fi

mkdir "$scratch/ctl" "$scratch/d"
cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
StateSaveLocation=$scratch/ctl
SlurmdSpoolDir=$scratch/d
SlurmctldPidFile=$scratch/ctl.pid
SlurmdPidFile=$scratch/d.pid
SlurmctldLogFile=$scratch/ctl.log
SlurmdLogFile=$scratch/d.log
ReturnToService=2
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$(free -m | awk '/^Mem:/ {print $2}') State=UNKNOWN
PartitionName=all Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
slurmctld
slurmd
for _ in $(seq 30); do
    [ "$(sinfo --noheader --format=%T 2>/dev/null)" = idle ] && break
    sleep 1
done
sinfo || { tail -5 "$scratch"/*.log >&2; exit 1; }
"$@"
