"""Uploads a run's trained models to the hub: adapters, heads and a model card."""

import shutil
import tempfile
from pathlib import Path

from collapse.arms import find_arm
from collapse.report.comparisons import summary_table
from collapse.utils.errors import UserError
from collapse.utils.files import BEFORE, finished_trainings, read_json, write_file, write_json


def open_repository(name: str) -> str:
    """Full name of a model repository of the hub; created as a private one if it does not exist.

    Called before a run, so that a wrong name or token is noticed before any training. Raises
    UserError for these.
    """
    import huggingface_hub

    try:
        api = huggingface_hub.HfApi()
        return api.create_repo(name, private=True, exist_ok=True).repo_id
    except Exception as error:  # of the hub, of its HTTP client, or for an invalid name
        raise _refused(name, error) from None


def push(run: Path, name: str) -> None:
    """Upload what lay_out makes of a run; replaces models of an earlier upload.

    Raises UserError when the upload fails.
    """
    import huggingface_hub

    with tempfile.TemporaryDirectory() as folder:
        trainings = lay_out(run, Path(folder), name)
        try:
            huggingface_hub.HfApi().upload_folder(
                repo_id=name,
                folder_path=folder,
                commit_message=f"{len(trainings)} trained models",
                delete_patterns="*-seed*/*",
            )
        except Exception as error:  # as in open_repository
            raise _refused(name, error) from None
    print(f"on the hub as {name}: {', '.join(trainings)}", flush=True)


def _refused(name: str, error: Exception) -> UserError:
    reason = f"{type(error).__name__}: {error}".partition("\n")[0]
    return UserError(
        f"the hub does not take {name} ({reason}): give --push-to-hub OWNER/NAME after "
        "`.venv/bin/hf auth login` with a token that may write; the same command, without --fresh, "
        "tries again and keeps what is trained."
    )


def lay_out(run: Path, target: Path, name: str) -> list[str]:
    """Copy every finished training of a results folder into target; returns the trainings' names.

    target gets README.md, results.json, settings.json, and a folder MODEL-seedN/ for each training,
    with what load_classifier and peft read of its last epoch. name: of the repository, for the
    card.
    """
    results = read_json(run / "results.json")
    model = results["settings"]["config"]["model"]
    here = {f"{arm}-seed{seed}" for arm, seed in finished_trainings(run)}  # others are published
    folders = [f"{arm}-seed{seed}" for arm, runs in results["models"].items() for seed in runs]
    folders = [folder for folder in folders if folder in here]
    for training in (run / "state" / folder for folder in folders):
        shared = target / training.name
        shutil.copytree(training / "final-adapter", shared / "final-adapter")
        for file in ("final.safetensors", "metrics.json"):
            shutil.copyfile(training / file, shared / file)
        # The name in place of the local path of the pretrained model.
        adapter = shared / "final-adapter/adapter_config.json"
        write_json(adapter, read_json(adapter) | {"base_model_name_or_path": model})
    shutil.copyfile(run / "results.json", target / "results.json")
    shutil.copyfile(run / "state/settings.json", target / "settings.json")
    write_file(target / "README.md", model_card(results, name, folders).encode())
    return folders


def model_card(results: dict, name: str, folders: list[str]) -> str:
    """The repository's README.md, model_card.md with the run's numbers in its braces."""
    from huggingface_hub import ModelCardData

    config = BEFORE["config"] | results["settings"]["config"]
    data = results["settings"]["data"]
    model, commit = config["model"], config.get("model_commit")
    head = ModelCardData(
        base_model=model if commit else None,  # without a commit it is not on the hub
        library_name="peft",
        pipeline_tag="text-classification",
        tags=["lora"],
    )
    rows = []
    for folder in folders:
        key, _, seed = folder.rpartition("-seed")
        run = results["models"][key][seed]
        accuracy, rank = run["final"]["accuracy"], run["val"][-1]["effective_rank"]
        before = run["initial"]["effective_rank"]
        rows.append(
            f"| `{folder}` | {find_arm(key).title} | {accuracy:.2%} | {rank:.1f} ({before:.1f}) |"
        )
    at = f" at commit {commit}" if commit else " (a folder with a model that is not on the hub)"
    template = Path(__file__).with_name("model_card.md").read_text()
    return template.format(
        head=head.to_yaml(),
        title=f"{results['experiment']} on {data['name']}",
        model=model,
        at=at,
        revision=f', revision="{commit}"' if commit else "",
        data=data["name"],
        train_rows=data["train_rows"],
        validation_rows=data["validation_rows"],
        classes=", ".join(data["class_names"]),
        pooling=config["pooling"],
        table="\n".join(rows),
        summary=summary_table(results).strip("\n"),
        name=name,
        folder=folders[0],
        code=results["git_commit"] or "that made them",
    )
