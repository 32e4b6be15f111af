"""lm-evaluation-harness against a running Polypeft and against its own `hf` backend: the same figures.

    python -m venv /tmp/lm-eval && /tmp/lm-eval/bin/pip install "lm-eval[api,hf]==0.4.13" peft
    POLYPEFT_API_KEY=pp-... /tmp/lm-eval/bin/python tests/clients/lm_eval/compare.py --folder MODEL_FOLDER \
        [--adapter NAME=FOLDER]

Three tasks over local data, in tasks/: multiple choice, perplexity and generation. The harness scores
prompts by `echo` with `logprobs`, several in a request. For the base, and for an adapter that the server has
under NAME and `hf` loads by peft from FOLDER, all metrics and all loglikelihoods must agree within TOLERANCE
(of the larger ones, that share), and all generated texts be equal. The status is 1 if they do not.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TASKS = ["polypeft_capitals", "polypeft_prose", "polypeft_countries"]
TOLERANCE = 1e-3
MAX_LENGTH = 512


def evaluate(backend: str, /, **arguments: Any) -> dict[str, Any]:
    """What the harness finds: metrics and samples, by task."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=str(HERE / "tasks"), include_defaults=False)
    found: dict[str, Any] | None = simple_evaluate(
        model=backend,
        model_args=arguments,
        tasks=TASKS,
        task_manager=tasks,
        batch_size=4,
        log_samples=True,
        bootstrap_iters=0,
    )
    assert found is not None
    return found


def numbers(found: dict[str, Any]) -> dict[str, float]:
    """Every metric and every loglikelihood by a name."""
    named = {
        f"{task} {metric.partition(',')[0]}": value
        for task, metrics in found["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, float | int) and "stderr" not in metric and metric != "sample_len"
    }
    for task, samples in found["samples"].items():
        for sample in samples:
            for i, answers in enumerate(sample["filtered_resps"]):
                first = answers[0] if isinstance(answers, list | tuple) else answers
                if isinstance(first, float):
                    named[f"{task} {sample['doc_id']}.{i} loglikelihood"] = first
    return named


def texts(found: dict[str, Any]) -> list[str]:
    return [str(sample["filtered_resps"][0]) for sample in found["samples"]["polypeft_countries"]]


def compare(name: str, ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Show the metrics side by side; whether everything agrees."""
    mine, other = numbers(ours), numbers(theirs)
    worst = max(abs(mine[key] - value) / max(1.0, abs(value)) for key, value in other.items())
    for key in other:
        if not key.endswith("loglikelihood"):
            say(f"{name:12} {key:40} {mine[key]:12.6f} {other[key]:12.6f}")
    same_texts = texts(ours) == texts(theirs)
    verdict = "equal" if same_texts else "DIFFER"
    say(f"{name:12} {len(other)} numbers, at most {worst:.1e} apart; texts {verdict}")
    return mine.keys() == other.keys() and worst <= TOLERANCE and same_texts


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="the base's id at the server")
    parser.add_argument("--folder", type=Path, required=True, help="the base's folder")
    parser.add_argument("--adapter", help="NAME=FOLDER")
    given = parser.parse_args()
    os.environ["OPENAI_API_KEY"] = os.environ["POLYPEFT_API_KEY"]
    folder = str(given.folder.resolve())
    name, _, adapter = (given.adapter or "").partition("=")
    models = [(given.model, {})] + ([(name, {"peft": str(Path(adapter).resolve())})] if name else [])
    os.chdir(HERE)  # the tasks name their data from here
    agree = True
    for model, peft in models:
        ours = evaluate(
            "local-completions",
            model=model,
            base_url=f"{given.url}/v1/completions",
            tokenizer=folder,
            max_length=MAX_LENGTH,
        )
        hf = {"pretrained": folder, "dtype": "float32", "device": "cpu", "max_length": MAX_LENGTH}
        agree &= compare(model, ours, evaluate("hf", **hf, **peft))
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
