"""What ZeRO keeps, sends and allocates on a rank, as DeepSpeed 0.19 does it under `mmcore.train.engine`; read in its
source and held to the real engine by tests."""

from mmcore.plan.job import Job, Setting

# DeepSpeed's defaults, in elements: what is reduced at a time, what is gathered ahead, and how far ahead a gathered
# parameter has to be needed again in order to stay.
BUCKET, PREFETCH, REUSE = 500_000_000, 50_000_000, 1_000_000_000


def states(job: Job, setting: Setting, *, is_cpu: bool) -> dict[str, float]:
    """Bytes by part that a rank holds from step to step: weights in the module's dtype, moments (and, from stage 1 on,
    a master, of float32 weights too: what is flattened is cloned) in float32. Stage 3 has its gradients and its bucket
    from the start, and small tensors whole beside its share."""
    size, ranks = setting.weight_bytes, setting.gpus if setting.zero else 1
    weights = job.trained * size + job.frozen_bytes(setting)
    has_all = setting.zero == 3
    return {
        "weights": weights / setting.gpus + size * job.small if has_all else weights,
        "optimizer": (12 if setting.zero else 8) * job.trained / ranks,
        "EMA": 4 * job.trained / ranks if setting.ema else 0.0,
        "gradients": size * job.trained / setting.gpus if has_all else 0.0,
        "buffers": bucket_bytes(job, setting, is_cpu=is_cpu) if has_all else 0.0,
    }


def bucket_bytes(job: Job, setting: Setting, *, is_cpu: bool) -> float:
    """The buffer that gradients are reduced in; on a CPU only what is written of it counts."""
    return setting.weight_bytes * (min(job.trained, BUCKET) if is_cpu else BUCKET)


def gathered_bytes(job: Job, setting: Setting) -> float:
    """Whole weights that stage 3 holds in a forward and backward, and the flat copy that they come in."""
    if setting.zero < 3:
        return 0.0
    released = job.parameters - job.small
    size = (setting.weight_bytes * job.trained + job.frozen_bytes(setting)) / job.parameters
    # what is needed again within REUSE stays: half of that before the backward begins, half after
    return size * (min(released, REUSE // 2 + PREFETCH) + min(released, PREFETCH))


def reduction(job: Job, setting: Setting, *, is_cpu: bool) -> tuple[float, float, float]:
    """Bytes of gradients and of buffers at the end of the backward, and of gradients in the step.

    While they are reduced: all gradients where a stage, or accumulation, leaves them on the parameters; a bucket, and
    the flat copy of it that is reduced; then a rank's share, and the copy of that for the optimizer.
    """
    size = setting.weight_bytes
    whole, share = size * job.trained, size * job.trained / setting.gpus
    bucket, flat = bucket_bytes(job, setting, is_cpu=is_cpu), size * min(job.trained, BUCKET)
    if setting.zero == 0:
        return whole, flat, whole
    of_step = share + 4 * job.trained / setting.gpus
    if setting.zero == 3:
        return whole if setting.accum > 1 else 0.0, flat, of_step - share
    if setting.zero == 1 or setting.accum > 1:
        return whole, bucket, of_step
    return share if job.trained > BUCKET else 0.0, bucket + max(flat, share), of_step


def traffic(job: Job, setting: Setting) -> dict[str, float]:
    """Bytes that a rank sends in a step, in rings: an all-reduce sends each byte twice, a gather once.

    Stages 1 and 2 reduce by all-reduce, as DeepSpeed's `use_multi_rank_bucket_allreduce` has it, and gather what each
    rank has stepped. Stage 3 gathers the weights in each forward, and once more for the backward what did not stay;
    small tensors once a step.
    """
    ranks, size = setting.gpus, setting.weight_bytes
    once = (ranks - 1) / ranks
    learned = size * job.trained * once
    if ranks == 1:
        return {}
    if setting.zero < 3:
        return {"gradients": 2 * learned} | ({"weights": learned} if setting.zero else {})
    everything = learned + job.frozen_bytes(setting) * once
    small = size * job.small * once
    forwards = job.forwards(setting)
    # after a forward that has no backward nothing is known of what will be needed again, and nothing stays
    again = max(0, job.parameters - REUSE // 2) / job.parameters if forwards == 1 else 1.0
    times = setting.accum * (forwards + again)
    return {"gradients": learned, "weights": small + (everything - small) * times}
