"""Score trained runs on texts and tasks, and report the results.

options → scoring → tasks → runs → table; options alone needs no torch
"""
