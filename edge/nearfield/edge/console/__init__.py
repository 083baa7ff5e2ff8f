"""The console: who may look, what is shown, how news reach the page, and the page itself."""
