"""Reading data: PASCAL-Context, NYUD-v2 and generated scenes; transforms; the resumable sampler; the loaders."""
