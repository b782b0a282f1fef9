"""What an MLflow store holds."""

import mlflow
from mlflow.entities import Run


def steps(uri: str, key: str = "loss") -> list[int]:
    """Steps of the only run's curve, in order of arrival; a doubled point shows twice."""
    client = mlflow.MlflowClient(uri)
    return [metric.step for metric in client.get_metric_history(only_run(uri).info.run_id, key)]


def only_run(uri: str) -> Run:
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return run
