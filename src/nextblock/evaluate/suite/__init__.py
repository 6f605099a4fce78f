"""The benchmarks of the AIM and XTRA papers, each measured by one probe."""
