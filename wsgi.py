"""What gunicorn and the flask command load: the application."""

from cdr_api import create_app

app = create_app()
