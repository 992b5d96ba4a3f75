"""Show clips to people: sheets, files."""
