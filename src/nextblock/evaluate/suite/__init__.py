"""The benchmarks of the AIM and XTRA papers: rows of data, and one probe for each."""
