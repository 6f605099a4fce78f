"""The benchmarks of the AIM and XTRA papers: what they are, where their images lie, a probe each, one table.

`benchmarks` and `published` are facts as data; `layouts` reads the files in the form in which each data set
is distributed; `check` compares what lies there with the papers' counts; `run` probes; `tables` writes.
"""
