#!/bin/bash
#SBATCH --job-name=cloudgate-tick
#SBATCH --time=12:00:00
#SBATCH --cpus-per-task=1
#SBATCH --mem=4G
#SBATCH --output=cloudgate-tick-%j.log
# One tick whose workers are SLURM jobs of their own (dask-jobqueue). Submit it from cron or scrontab:
#   17 */6 * * * sbatch --dependency=singleton deploy/slurm/tick.sh /path/schedule.yaml
# singleton: a tick that still runs is waited for.
set -euo pipefail

schedule="${1:?usage: sbatch tick.sh SCHEDULE.yaml [PARTITION]}"
partition="${2:-normal}"

exec cloudgate schedule tick "$schedule" \
    --set cluster.kind=slurm \
    --set "cluster.queue=$partition" \
    --set cluster.workers=32 \
    --set cluster.walltime=02:00:00
