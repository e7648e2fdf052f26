#!/usr/bin/env bash
# A real Slurm on this one machine, for the tests that need one:
#   sudo tests/slurm.sh start     installs Debian's packages if they are missing, starts the daemons
#   sudo tests/slurm.sh stop
set -euo pipefail
host=$(hostname -s)
conf=/etc/slurm/slurm.conf

start() {
  if ! command -v sbatch > /dev/null; then
    apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q slurm-wlm munge
  fi
  if [ ! -s /etc/munge/munge.key ]; then
    dd if=/dev/urandom of=/etc/munge/munge.key bs=1 count=1024 status=none
  fi
  chown munge: /etc/munge/munge.key && chmod 400 /etc/munge/munge.key
  mkdir -p /run/munge /var/log/munge /var/lib/munge
  chown munge: /run/munge /var/log/munge /var/lib/munge
  pgrep -x munged > /dev/null || su -s /bin/sh munge -c /usr/sbin/munged
  mkdir -p /var/spool/slurmctld /var/spool/slurmd /var/log/slurm /etc/slurm
  cat > "$conf" << CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation=/var/spool/slurmctld
SlurmdSpoolDir=/var/spool/slurmd
SlurmctldLogFile=/var/log/slurm/slurmctld.log
SlurmdLogFile=/var/log/slurm/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobRequeue=1
SchedulerParameters=batch_sched_delay=0,sched_interval=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
  pgrep -x slurmctld > /dev/null || slurmctld
  pgrep -x slurmd > /dev/null || slurmd
  for _ in $(seq 30); do
    if sinfo -h -o %T | grep -q idle; then sinfo && return; fi
    sleep 1
  done
  sinfo; tail -n 20 /var/log/slurm/*.log; exit 1
}

stop() {
  scancel --me 2> /dev/null || true
  pkill -x slurmctld || true
  pkill -x slurmd || true
  pkill -x munged || true
}

"$1"
