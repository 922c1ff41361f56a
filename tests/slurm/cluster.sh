#!/usr/bin/env bash
# A one-node Slurm cluster for the tests, as root, without systemd: `cluster.sh up | down`; a second `up` changes nothing.
# A second node, `spare`, exists on paper only: a job that excludes the first waits for it. Partition low can be
# preempted (its jobs are requeued) by partition high. Debian's Slurm 22.05, or newer.
#   apt-get install -y --no-install-recommends slurm-wlm slurmctld slurmd slurm-client munge
set -euo pipefail

STATE=${MEGATRON_RL_SLURM:-/tmp/megatron_rl_slurm}
export SLURM_CONF=$STATE/slurm.conf
HOST=$(hostname -s)

stop() {
    local name
    for name in slurmd slurmctld; do
        [ ! -s "$STATE/$name.pid" ] || kill "$(cat "$STATE/$name.pid")" 2>/dev/null || true
    done
    [ ! -s "$STATE/munged.pid" ] || kill "$(cat "$STATE/munged.pid")" 2>/dev/null || true
}

wait_for() {  # wait_for COMMAND...: at most 60 s
    local i
    for i in $(seq 120); do "$@" >/dev/null 2>&1 && return; sleep 0.5; done
    echo "cluster.sh: no answer to: $*; logs: $STATE/*.log" >&2
    exit 1
}

start_munge() {
    mkdir -p "$STATE/munge"
    [ -s "$STATE/munge.key" ] || head -c 1024 /dev/urandom > "$STATE/munge.key"
    chmod 755 "$STATE"
    chown -R munge:munge "$STATE/munge" "$STATE/munge.key"
    chmod 400 "$STATE/munge.key"
    munge -S "$STATE/munge/socket" -n >/dev/null 2>&1 && return
    su -s /bin/sh munge -c "/usr/sbin/munged -S $STATE/munge/socket --key-file=$STATE/munge.key \
        --pid-file=$STATE/munge/munged.pid --log-file=$STATE/munge/munged.log --seed-file=$STATE/munge/seed" >/dev/null
    ln -sf munge/munged.pid "$STATE/munged.pid"
    wait_for munge -S "$STATE/munge/socket" -n
}

write_config() {
    cat > "$SLURM_CONF" <<EOF
ClusterName=megatron-rl-tests
SlurmctldHost=$HOST(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$STATE/munge/socket,cred_expire=10
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldPidFile=$STATE/slurmctld.pid
SlurmdPidFile=$STATE/slurmd.pid
StateSaveLocation=$STATE/ctld
SlurmdSpoolDir=$STATE/d
SlurmctldLogFile=$STATE/slurmctld.log
SlurmdLogFile=$STATE/slurmd.log
InactiveLimit=0
MinJobAge=300
KillWait=4
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=100000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
NodeName=$HOST NodeAddr=127.0.0.1 CPUs=8 State=UNKNOWN
NodeName=spare NodeAddr=192.0.2.1 CPUs=8 State=DOWN Reason=no-such-machine
PartitionName=low Nodes=$HOST,spare Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=5 MaxTime=INFINITE State=UP
PartitionName=high Nodes=$HOST,spare PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
EOF
}

case ${1:-up} in
    down) stop ;;
    up)
        mkdir -p "$STATE/ctld" "$STATE/d"
        start_munge
        scontrol ping >/dev/null 2>&1 || write_config
        scontrol ping 2>/dev/null | grep -q 'is UP' || slurmctld
        wait_for sh -c "scontrol ping | grep -q 'is UP'"
        if ! [ -s "$STATE/slurmd.pid" ] || ! kill -0 "$(cat "$STATE/slurmd.pid")" 2>/dev/null; then slurmd -N "$HOST"; fi
        wait_for sh -c "sinfo -h -o %T | grep -qE 'idle|mixed|allocated'"
        ;;
    *) echo "usage: cluster.sh up | down" >&2; exit 2 ;;
esac
