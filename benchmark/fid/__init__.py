"""The networks behind `fid_evaluation.py`."""
