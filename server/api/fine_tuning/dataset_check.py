"""Checks the training data of a new job, line by line, before the job is queued."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from anyio.to_thread import run_sync

from server.api.http.temp_files import temp_folder
from server.api.services import Services
from server.errors import InvalidField, NotFound, shown
from server.files.files import File
from server.finetune.data import dataset


@dataclass(frozen=True)
class DataFiles:
    """The tenant's files that a job names."""

    training: File
    validation: File | None

    @property
    def files(self) -> list[tuple[str, File]]:
        """With the names of the job's fields."""
        training = [("training_file", self.training)]
        return training + ([("validation_file", self.validation)] if self.validation else [])


async def find(deps: Services, tenant: str, training: str, validation: str | None) -> DataFiles:
    """The files with these ids. Raises InvalidField, and NotFound also for files of other tenants."""
    if training == validation:
        raise InvalidField(
            "validation_file is the training file: what was trained on proves nothing.",
            param="validation_file",
        )
    return DataFiles(
        await _file(deps, tenant, training, "training_file"),
        (validation and await _file(deps, tenant, validation, "validation_file")) or None,
    )


async def check(deps: Services, data: DataFiles, max_tokens: int) -> dict[str, dataset.Report]:
    """A report of each file, by the job's field. Raises InvalidField with the first errors and a count."""
    settings = deps.settings
    limits = dataset.DatasetLimits(
        file_bytes=settings.max_file_bytes,
        examples=settings.max_training_examples,
        tokens=settings.max_training_tokens,
    )
    reports = {}
    with temp_folder(settings) as folder:
        for param, file in data.files:
            path = Path(folder) / param
            await deps.files.download(file, path)
            report = await run_sync(
                partial(dataset.check, path, deps.tokenizer, max_tokens, limits, param=param)
            )
            if error := dataset.refusal(report, param):
                raise error
            reports[param] = report
    return reports


def dataset_stats(report: dataset.Report) -> dict[str, int]:
    """The counts of a file that a job shows."""
    return {
        "examples": report.examples,
        "tokens": report.tokens,
        "trained_tokens": report.trained_tokens,
        "truncated": report.truncated,
        "dropped": report.dropped,
        "max_length": report.max_length,
    }


async def _file(deps: Services, tenant: str, id_: str, param: str) -> File:
    try:
        file = await deps.files.get(tenant, id_)
    except NotFound as error:
        raise NotFound(error.message, param=param) from None
    if file.purpose != "fine-tune":
        raise InvalidField(
            f"{param} {shown(id_)} has the purpose {file.purpose}, not fine-tune.", param=param
        )
    return file
