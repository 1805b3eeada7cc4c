# mypy: ignore-errors
"""Flask with Flask-SQLAlchemy and jsonify: a model whose table is reflected, all calls at once."""

import hashlib
import os
from datetime import UTC, datetime, timedelta
from uuid import UUID

from flask import Flask, abort, jsonify, request
from flask_sqlalchemy import SQLAlchemy

COLUMNS = os.environ["BENCH_COLUMNS"].split(", ")

app = Flask(__name__)
app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["BENCH_DSN"].replace("postgresql://", "postgresql+psycopg://")
app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {"pool_size": 8}
db = SQLAlchemy(app)

with app.app_context():
    table = db.Table("v_xml_cdr", db.metadata, autoload_with=db.engine, include_columns=COLUMNS)
    db.engine.dispose()


class Call(db.Model):
    __table__ = table


TOKEN = db.text(os.environ["BENCH_TOKEN_QUERY"].replace("%s", ":digest", 1).replace("%s", ":domain"))


@app.before_request
def check_token():
    token = request.authorization.token if request.authorization else ""
    values = {"digest": hashlib.sha256(token.encode()).digest(), "domain": request.args["domain_name"]}
    if not db.session.execute(TOKEN, {name: values[name] for name in TOKEN.compile().params}).scalar():
        abort(401)
    if os.environ["BENCH_BEGIN"]:
        db.session.rollback()
        db.session.connection(execution_options={"isolation_level": "REPEATABLE READ", "postgresql_readonly": True})


@app.get("/call_range")
def call_range():
    start, end = (datetime.fromtimestamp(int(request.args[name]), UTC) for name in ("from", "to"))
    domain_uuid = UUID(hashlib.md5(f"domain {request.args['domain_name']}".encode()).hexdigest())  # as demo makes it
    query = (
        db.select(Call)
        .where(Call.domain_uuid == domain_uuid)
        .where(Call.end_stamp >= start, Call.end_stamp < end + timedelta(seconds=1))
        .order_by(Call.end_stamp, Call.xml_cdr_uuid)
    )
    calls = db.session.execute(query).scalars().all()
    return jsonify([{name: getattr(call, name) for name in COLUMNS} for call in calls])
