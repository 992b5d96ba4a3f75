"""Show a run as a web page: a prompt, a button, the clip. `serve` needs the extra [demo], the rest does not."""
