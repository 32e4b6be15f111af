"""Fine-tuning: jobs, workers, and how training goes."""

from deploy.grafana.panels import ON, RATE, Panel, gauge, rate, stat

TUNING: dict[str, list[Panel]] = {
    "Jobs": [
        stat(
            "Queued",
            "Jobs that wait for a worker.",
            "short",
            gauge("polypeft_jobs", 'state="queued"', over="max"),
        ),
        stat(
            "In training",
            "Jobs that a worker has.",
            "short",
            gauge("polypeft_jobs", 'state="training"', over="max"),
        ),
        stat(
            "Longest silence",
            "Of the workers that have a job. Over a minute: it hangs or is gone.",
            "s",
            gauge("polypeft_job_heartbeat_age_seconds", over="max"),
            (30, 60),
        ),
        Panel(
            "Unfinished jobs",
            "publishing: trained, and being checked by the engine.",
            "short",
            ((gauge("polypeft_jobs", by="state", over="max"), "{{state}}"),),
        ),
        Panel(
            "Jobs ended",
            "Since the beginning, by how.",
            "short",
            ((gauge("polypeft_jobs_finished_total", by="status", over="max"), "{{status}}"),),
        ),
        Panel(
            "Workers",
            "Heard of within a minute.",
            "short",
            ((gauge("polypeft_workers", by="state", over="max"), "{{state}}"),),
        ),
    ],
    "Training": [
        Panel(
            "Loss",
            "Of each worker's last update. It should fall and flatten out.",
            "short",
            ((gauge("polypeft_training_loss", by="worker", over="max"), "{{worker}}"),),
        ),
        Panel(
            "Tokens trained on",
            "A second, all workers.",
            "short",
            ((f"max(rate(polypeft_training_tokens_total{{{ON}}}[{RATE}]))", "tokens"),),
        ),
        Panel(
            "Updates",
            "A second, all workers.",
            "short",
            ((f"max(rate(polypeft_training_steps_total{{{ON}}}[{RATE}]))", "updates"),),
        ),
        Panel(
            "Attempts",
            "saved: handed on; lost: its worker vanished; crashed, disk, time, other: failed.",
            "short",
            ((gauge("polypeft_training_attempts_total", by="outcome", over="max"), "{{outcome}}"),),
        ),
        Panel(
            "Checkpoints",
            "Stored since the beginning: what a job goes on from after a crash.",
            "short",
            ((gauge("polypeft_checkpoints_total", over="max"), "checkpoints"),),
        ),
        Panel(
            "Bytes of checkpoints",
            "Stored since the beginning.",
            "bytes",
            ((gauge("polypeft_checkpoint_bytes_total", over="max"), "bytes"),),
        ),
    ],
    "Workers with a port of their own": [
        Panel(
            "Busy",
            "1 while a worker has a job.",
            "short",
            ((gauge("polypeft_worker_busy", by="instance"), "{{instance}}"),),
        ),
        Panel(
            "Tokens by worker",
            "Trained on, a second.",
            "short",
            ((rate("polypeft_worker_training_tokens_total", by="instance"), "{{instance}}"),),
        ),
        Panel(
            "Loss by worker",
            "Of the last update.",
            "short",
            ((gauge("polypeft_worker_training_loss", by="instance", over="max"), "{{instance}}"),),
        ),
        Panel(
            "Updates by worker",
            "Steps of the optimizer a second.",
            "short",
            ((rate("polypeft_worker_training_steps_total", by="instance"), "{{instance}}"),),
        ),
        Panel(
            "Heartbeat",
            "Seconds since the worker's job was heard of by Valkey, and beats that failed.",
            "short",
            (
                (
                    gauge("polypeft_worker_heartbeat_age_seconds", by="instance", over="max"),
                    "age: {{instance}}",
                ),
                (rate("polypeft_worker_heartbeat_failures_total", by="instance"), "failed: {{instance}}"),
            ),
        ),
        Panel(
            "Attempts by worker",
            "How they ended, since it started.",
            "short",
            ((gauge("polypeft_worker_attempts_total", by="instance, outcome"), "{{instance}} {{outcome}}"),),
        ),
    ],
}
