"""A run's memory as pictures: PNG plots, and one HTML page that works from disk.

    trace.jsonl, run.json, the video -> study.py -> Study (numbers) -> plots.py -> PNG files
                                                                    -> page.py  -> one HTML file

Reads a run folder, also while it is being made, and takes no lock. Loads no torch.
"""
