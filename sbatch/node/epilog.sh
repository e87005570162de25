#!/bin/bash
# Slurm's Epilog on a node with GPUs: takes a job that is over out of what prolog.sh wrote, and removes the working
# directories that replicas leave behind when they are killed. See prolog.sh for how both are installed.
#
# An epilog that fails drains its node, so this one says what went wrong and ends with 0 whatever happens.
PATH=/usr/sbin:/usr/bin:/sbin:/bin
mapping=${DCGM_HPC_JOB_MAPPING_DIR:-/run/dcgm-job-mapping}
scratch=${REPLICA_SCRATCH_DIRS:-/tmp}

# All files are looked at, because a job's GPUs may not be told any more. A file without a line goes: dcgm-exporter shows
# a GPU whose file is empty as no GPU at all, and an empty line as a job without a name.
forget() {
  local file new
  [[ -d $mapping ]] || return 0
  exec 9>"$mapping/.lock" && flock -w 5 9 || return
  for file in "$mapping"/[0-9]*; do
    if [[ ! -f $file ]] || ! grep -qxF -e "$SLURM_JOB_ID" "$file"; then continue; fi
    new=$mapping/.${file##*/}.new
    if grep -vxF -e "$SLURM_JOB_ID" "$file" | grep . >"$new"; then
      mv -f "$new" "$file" || return
    else
      rm -f "$new" "$file" || return
    fi
  done
}

# The job id is in the directory's name, so nothing of another job is touched. Whoever owns a directory can put links into
# it and swap it meanwhile: so it is removed with its owner's rights, never with root's.
sweep() {
  local folder left owner
  for folder in $scratch; do
    for left in "$folder/replica.$SLURM_JOB_ID."??????????; do
      if [[ ! -d $left || -L $left ]]; then continue; fi
      owner=$(stat -c %u:%g -- "$left") || continue
      if ((EUID == 0)) && [[ $owner != 0:* ]]; then
        setpriv --reuid "${owner%:*}" --regid "${owner#*:}" --clear-groups -- rm -rf --one-file-system -- "$left"
      else
        rm -rf --one-file-system -- "$left"
      fi
    done
  done
}

if [[ ${SLURM_JOB_ID:-} =~ ^[0-9]+$ ]]; then
  (forget) || echo "dcgm: job $SLURM_JOB_ID may still be in $mapping" >&2
  (sweep)
fi
exit 0
