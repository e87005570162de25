#!/bin/bash
# Slurm's Prolog on a node with GPUs: tells dcgm-exporter which job has which GPU, for the label hpc_job of its metrics.
#
#   Prolog=/etc/slurm/prolog.d/*     with this file there; epilog.sh likewise, as Epilog=/etc/slurm/epilog.d/*
#   PrologFlags=Alloc                so that it runs before the job's first process, on every node of it
#   dcgm-exporter --hpc-job-mapping-dir=/run/dcgm-job-mapping
#
# The folder holds a file for each GPU in use, named by its index, with one job id a line; of a MIG instance the name is
# `gpu.instance`. Slurm counts MIG instances through, so a node that has them needs the file below: a line
# `<Slurm's index> <gpu>.<instance>` for each. Slurm's indices must otherwise be the driver's, as AutoDetect=nvml makes them.
#
# A prolog that fails drains its node, so this one says what went wrong and ends with 0 whatever happens.
PATH=/usr/sbin:/usr/bin:/sbin:/bin
mapping=${DCGM_HPC_JOB_MAPPING_DIR:-/run/dcgm-job-mapping}
mig_names=${DCGM_MIG_NAMES_FILE:-/etc/slurm/dcgm-mig-names}

# Slurm writes "0,1,5" or "0-3", or nothing for a job without GPUs.
indices() {
  local part first last
  for part in ${1//,/ }; do
    if [[ $part =~ ^[0-9]+$ ]]; then
      echo "$((10#$part))"
    elif [[ $part =~ ^([0-9]{1,4})-([0-9]{1,4})$ ]]; then
      first=$((10#${BASH_REMATCH[1]})) last=$((10#${BASH_REMATCH[2]}))
      while ((first <= last)); do echo "$((first++))"; done
    fi
  done
}

name_of() {
  local index name
  if [[ -r $mig_names ]]; then
    while read -r index name _; do
      if [[ $index == "$1" && $name =~ ^[0-9]+(\.[0-9]+)?$ ]]; then echo "$name" && return; fi
    done <"$mig_names"
  fi
  echo "$1"
}

# A file appears whole or not at all: dcgm-exporter may read at any moment. Names that begin with a dot are none of its.
add() {
  local file=$mapping/$1 new=$mapping/.$1.new
  if [[ -f $file ]]; then grep -vxF -e "$SLURM_JOB_ID" "$file" >"$new"; else : >"$new"; fi
  echo "$SLURM_JOB_ID" >>"$new" && mv -f "$new" "$file"
}

record() {
  local index
  umask 022
  mkdir -p "$mapping" && exec 9>"$mapping/.lock" && flock -w 5 9 || return
  for index in $(indices "${SLURM_JOB_GPUS:-}"); do add "$(name_of "$index")" || return; done
}

if [[ ${SLURM_JOB_ID:-} =~ ^[0-9]+$ && -n ${SLURM_JOB_GPUS:-} ]]; then
  (record) || echo "dcgm: job $SLURM_JOB_ID is missing in $mapping" >&2
fi
exit 0
