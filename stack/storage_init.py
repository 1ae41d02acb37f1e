"""One-shot of the Compose stack: `storage_init.py BUCKET...` makes the buckets and MLflow's user of the pipeline.

Environment: AWS's own for an administrator of the store; MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME and
MLFLOW_TRACKING_PASSWORD for an administrator of MLflow; MLFLOW_PIPELINE_USER and MLFLOW_PIPELINE_PASSWORD. Doing it
again is safe; the user's password becomes the one of the environment.
"""

from __future__ import annotations

import os
import sys

UNFINISHED_UPLOADS = {
    "ID": "unfinished-uploads",
    "Status": "Enabled",
    "Filter": {"Prefix": ""},
    "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 7},
}


def ensure_buckets(names: list[str]) -> None:
    """Make the buckets that are missing, each with a rule that removes what broken uploads leave."""
    import boto3

    store = boto3.client("s3")
    present = {bucket["Name"] for bucket in store.list_buckets()["Buckets"]}
    for name in names:
        if name not in present:
            store.create_bucket(Bucket=name)
        store.put_bucket_lifecycle_configuration(Bucket=name, LifecycleConfiguration={"Rules": [UNFINISHED_UPLOADS]})
        print(f"bucket {name} is {'there' if name in present else 'made'}")


def ensure_user(name: str, password: str) -> None:
    """Make MLflow's user of the pipeline, which is no administrator, or set its password."""
    from mlflow.exceptions import MlflowException
    from mlflow.server import get_app_client

    users = get_app_client("basic-auth", tracking_uri=os.environ["MLFLOW_TRACKING_URI"])
    try:
        users.get_user(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        users.create_user(name, password)
        print(f"user {name} made")
    else:
        users.update_user_password(name, password)
        print(f"user {name} is there; its password is the one of this environment")


if __name__ == "__main__":
    ensure_buckets(sys.argv[1:])
    ensure_user(os.environ["MLFLOW_PIPELINE_USER"], os.environ["MLFLOW_PIPELINE_PASSWORD"])
