"""`make demo`: the whole chain through Airflow and MLflow on this machine, ending with a table of what came out.

    python demo/run.py                                     generated pictures of handwritten digits
    python demo/run.py --gate fail                         the same with a limit no engine reaches: a rejected run
    python demo/run.py --dataset DIR --pretrain DIR --unlabeled DIR --params FILE      your COCO folders

Airflow runs the DAG without servers on a fresh SQLite database; MLflow logs to a file in the workspace. Everything
lies in `.demo`; a second run reuses what the first one finished.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
HOME = REPOSITORY / ".demo"
WORKSPACE = HOME / "workspace"
UNREACHABLE_MAP = 0.999
STEP_LOGGER = "airflow.task.operators.step_operator"


def main() -> int:
    """Make the data, run the DAG, print the table. 0 when the run ended as it should."""
    options = _read_options()
    HOME.mkdir(exist_ok=True)
    form = _form_values(options)
    began = time.monotonic()
    outcome = _run_dag(form, options.params.resolve())
    if outcome is None or outcome["state"] != "success":
        print(f"\nThe run failed; all of Airflow's words are in {HOME / 'airflow.log'}", file=sys.stderr)
        return 1
    results = read_results(WORKSPACE, outcome["run"])
    print(
        table(results, outcome["run"], None if options.dataset else HOME / "digits" / "unlabeled" / "hidden_truth.json")
    )
    print(f"\n{_minutes(time.monotonic() - began)} for the whole chain; its log is {_shown(HOME / 'airflow.log')}")
    print(f"Open the UIs:  NASLINE_WORKSPACE={_shown(WORKSPACE)} make up")
    return _judge(results, options)


def _read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run the whole chain once.")
    parser.add_argument("--dataset", type=Path, help="labelled target set, a COCO folder; default: generated digits")
    parser.add_argument("--pretrain", type=Path, help="labelled pretraining set, a COCO folder")
    parser.add_argument("--unlabeled", type=Path, help="folder of unlabelled images (images/)")
    parser.add_argument("--params", type=Path, default=REPOSITORY / "params.demo.yaml", help="parameter file")
    parser.add_argument("--gate", choices=["pass", "fail"], default="pass", help="fail: set a limit no engine reaches")
    options = parser.parse_args()
    if options.dataset is None and (options.pretrain or options.unlabeled):
        parser.error("--pretrain and --unlabeled need --dataset")
    return options


def _form_values(options: argparse.Namespace) -> dict[str, Any]:
    """What a person would put into the trigger form."""
    folders = {
        "start.dataset": options.dataset,
        "start.pretrain_dataset": options.pretrain,
        "start.unlabeled_dataset": options.unlabeled,
    }
    if options.dataset is None:
        folders = _generated_digits()
    form: dict[str, Any] = {key: str(folder.resolve()) for key, folder in folders.items() if folder}
    if options.gate == "fail":
        form["gate.minimum_map"] = UNREACHABLE_MAP
    return form


def _generated_digits() -> dict[str, Path | None]:
    folder = HOME / "digits"
    if not folder.exists():
        print("Generating pictures of handwritten digits ...", flush=True)
        subprocess.run([sys.executable, str(REPOSITORY / "demo" / "digits.py"), str(folder)], check=True)
    return {
        "start.dataset": folder / "target",
        "start.pretrain_dataset": folder / "pretrain",
        "start.unlabeled_dataset": folder / "unlabeled",
    }


# the run ------------------------------------------------------------------------------------------------


def _run_dag(form: dict[str, Any], parameter_file: Path) -> dict[str, Any] | None:
    """Run the DAG in a process of its own: its steps' lines go to the terminal, all of its lines to a file."""
    shutil.rmtree(HOME / "airflow", ignore_errors=True)
    command = [sys.executable, str(REPOSITORY / "demo" / "airflow_run.py"), json.dumps(form)]
    process = subprocess.Popen(
        command, env=_environment(parameter_file), cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace",
    )  # fmt: skip
    assert process.stdout is not None
    last_line, began = "", time.monotonic()
    try:
        with (HOME / "airflow.log").open("w", encoding="utf-8") as log:
            for last_line in process.stdout:
                log.write(last_line)
                show_line(last_line, time.monotonic() - began)
    except KeyboardInterrupt:
        process.wait()
        raise
    process.wait()
    return json.loads(last_line) if last_line.startswith('{"run"') else None


def _environment(parameter_file: Path) -> dict[str, str]:
    """Nothing of another Airflow or MLflow that this terminal may be set up for."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AIRFLOW", "MLFLOW_TRACKING"))}
    return {
        **kept,
        "AIRFLOW_HOME": str(HOME / "airflow"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__DAGS_FOLDER": str(REPOSITORY / "dags"),
        "AIRFLOW__LOGGING__JSON_LOGS": "True",
        "NASLINE_WORKSPACE": str(WORKSPACE),
        "NASLINE_PARAMS": str(parameter_file),
    }


def show_line(line: str, seconds: float) -> None:
    """Print what a step said, and why a task failed; Airflow's own words stay in the log file."""
    try:
        entry = json.loads(line)
    except ValueError:
        return
    event = str(entry.get("event", ""))
    if str(entry.get("logger", "")).startswith(STEP_LOGGER):
        if event.startswith("Running "):
            event = f"▶ {event.partition('pipeline_tasks ')[2].partition(' --workspace')[0] or event}"
            event = event if "--role" not in str(entry["event"]) else f"{event} {str(entry['event']).split()[-1]}"
        print(f"{seconds:6.1f} s  {event}", flush=True)
    elif event == "Task failed with exception":
        for error in entry.get("exception", []):
            print(f"{seconds:6.1f} s  failed: {error.get('exc_value', '')}", flush=True)


# the table ----------------------------------------------------------------------------------------------


def read_results(workspace: Path, run: str) -> dict[str, dict[str, Any]]:
    """Manifest of each finished step of a run, with its folder under `folder`."""
    steps = json.loads((workspace / "runs" / run / "run.json").read_text(encoding="utf-8"))["steps"]
    results = {}
    for name, key in steps.items():
        folder = workspace / "steps" / name.split("/")[0] / key
        results[name] = {**json.loads((folder / "manifest.json").read_text(encoding="utf-8")), "folder": folder}
    return results


def table(results: dict[str, dict[str, Any]], run: str, hidden_truth: Path | None) -> str:
    """What the run achieved, in a few lines; with the true boxes of the unlabelled set where they are known."""
    gate, gate_folder = results["gate"]["summary"], results["gate"]["folder"]
    timed = json.loads((gate_folder / "latency.json").read_text(encoding="utf-8"))["int8"]
    steps = {name: manifest for name, manifest in results.items() if "shard" not in name}
    reused = [name for name, manifest in steps.items() if manifest["made_by_run"] != run]
    runtime = f"{timed['runtime']} {timed['runtime_version'].partition('-')[0]}, threads {timed['threads']}"
    where = f"{timed['device']['device']}, {runtime}, batch {timed['batch']}, {timed['input_size']} pixels"
    faster = f"{gate['speedup']:.2f} times as fast"
    lines = [
        "",
        f"{'engine':8}{'mAP50-95':>10}{'latency p50':>14}   on the test split; {where}",
        f"{'float':8}{gate['float_map50_95']:10.4f}{gate['float_latency_p50_ms']:11.2f} ms",
        f"{'INT8':8}{gate['int8_map50_95']:10.4f}{gate['int8_latency_p50_ms']:11.2f} ms   {faster}",
        "",
        f"quantization  {_quantization(results['quantize']['summary'])}",
        f"pseudo-labels {_pseudo_labels(results['pseudo_label'], hidden_truth)}",
        f"verdict       {gate['verdict']}",
        f"registered    {_registered(results)}",
        f"pictures      {_shown(gate_folder / 'plots')}",
        f"data report   {_shown(results['validate_data']['folder'] / 'data_docs' / 'index.html')}",
    ]
    if reused:
        lines.append(f"reused        {', '.join(reused)} (finished by an earlier run)")
    return "\n".join(lines)


def _quantization(summary: dict[str, Any]) -> str:
    """mAP on the validation split of every stage that was tried."""
    stages = [("float", "float"), ("ptq", "PTQ"), ("selective", "selective"), ("qat", "QAT")]
    found = [f"{name} {summary[f'{key}_map50_95']:.4f}" for key, name in stages if f"{key}_map50_95" in summary]
    return f"{', '.join(found)} (mAP50-95, validation split); published: {summary['published']}"


def _pseudo_labels(manifest: dict[str, Any], hidden_truth: Path | None) -> str:
    if hidden_truth is None:
        return f"{manifest['summary']['boxes']} boxes kept"
    sys.path.insert(0, str(REPOSITORY))
    from label_quality import label_quality

    return label_quality(manifest["folder"] / "tables", hidden_truth)


def _registered(results: dict[str, dict[str, Any]]) -> str:
    if "register" not in results or not results["register"]["summary"]["registered"]:
        return "nothing; the champion, if there is one, stays"
    summary = results["register"]["summary"]
    return f"{summary['model']} version {summary['version']} (models:/{summary['model']}@champion)"


def _judge(results: dict[str, dict[str, Any]], options: argparse.Namespace) -> int:
    """The demo's own data must end as asked for; on other data a rejection is a result like any other."""
    passed = bool(results["gate"]["summary"]["passed"])
    if options.dataset is not None or passed == (options.gate == "pass"):
        return 0
    print(f"\nThe demo should have ended with gate={options.gate}.", file=sys.stderr)
    return 1


def _shown(path: Path) -> str:
    """Relative to the repository where that is shorter to read."""
    return str(path.relative_to(REPOSITORY)) if path.is_relative_to(REPOSITORY) else str(path)


def _minutes(seconds: float) -> str:
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"


if __name__ == "__main__":
    raise SystemExit(main())
