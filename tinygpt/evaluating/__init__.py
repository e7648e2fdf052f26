"""Score trained runs on texts and tasks: options → scoring → tasks → runs → table."""
