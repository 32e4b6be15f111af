"""A job's data, checked line by line before anything is queued."""

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
class Data:
    """The tenant's files that a job names."""

    training: File
    validation: File | None

    @property
    def files(self) -> list[tuple[str, File]]:
        named = [("training_file", self.training)]
        return named + ([("validation_file", self.validation)] if self.validation else [])


async def find(deps: Services, tenant: str, training: str, validation: str | None) -> Data:
    """Raises NotFound with the field's name, the same for an unknown file and another tenant's."""
    if training == validation:
        raise InvalidField(
            "validation_file is the training file: what was trained on proves nothing.",
            param="validation_file",
        )
    return Data(
        await _file(deps, tenant, training, "training_file"),
        (validation and await _file(deps, tenant, validation, "validation_file")) or None,
    )


async def check(deps: Services, data: Data, max_tokens: int) -> dict[str, dataset.Report]:
    """What is in the files. Raises InvalidField with the first problems, and how many there are."""
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
    """What a job tells of a file."""
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
