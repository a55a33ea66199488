"""Reports: a run or a study as one HTML page that needs no server, no network and no other file."""
