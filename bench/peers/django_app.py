# mypy: ignore-errors
"""Django REST framework: ListAPIView and ModelSerializer over the model that inspectdb writes.

Whole numbers are integers here: inspectdb cannot know that, and would have
Decimals of 65,535 digits.
"""

import hashlib
import os
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qs, urlsplit
from uuid import UUID

import django
from django.conf import settings

url = urlsplit(os.environ["BENCH_DSN"])
settings.configure(
    ALLOWED_HOSTS=["127.0.0.1"],
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": url.path[1:],
            "USER": url.username,
            "HOST": parse_qs(url.query)["host"][0],
            "OPTIONS": {"pool": {"min_size": 1, "max_size": 8}},
        }
    },
    INSTALLED_APPS=["django.contrib.contenttypes", "django.contrib.auth", "rest_framework"],
    MIDDLEWARE=["django.middleware.common.CommonMiddleware"],
    REST_FRAMEWORK={"DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.JSONRenderer"]},
    ROOT_URLCONF=__name__,
    USE_TZ=True,
)
django.setup()

from django.core.wsgi import get_wsgi_application  # noqa: E402 (they need the settings)
from django.db import connection, models, transaction  # noqa: E402
from django.urls import path  # noqa: E402
from rest_framework import authentication, exceptions, generics, permissions, serializers  # noqa: E402


class Call(models.Model):
    xml_cdr_uuid = models.UUIDField(primary_key=True)
    domain_uuid = models.UUIDField(null=True)
    extension_uuid = models.UUIDField(null=True)
    sip_call_id = models.TextField(null=True)
    domain_name = models.TextField(null=True)
    accountcode = models.TextField(null=True)
    direction = models.TextField(null=True)
    default_language = models.TextField(null=True)
    context = models.TextField(null=True)
    caller_id_name = models.TextField(null=True)
    caller_id_number = models.TextField(null=True)
    caller_destination = models.TextField(null=True)
    source_number = models.TextField(null=True)
    destination_number = models.TextField(null=True)
    start_epoch = models.BigIntegerField(null=True)
    start_stamp = models.DateTimeField(null=True)
    answer_stamp = models.DateTimeField(null=True)
    answer_epoch = models.BigIntegerField(null=True)
    end_epoch = models.BigIntegerField(null=True)
    end_stamp = models.DateTimeField(null=True)
    duration = models.BigIntegerField(null=True)
    mduration = models.BigIntegerField(null=True)
    billsec = models.BigIntegerField(null=True)
    billmsec = models.BigIntegerField(null=True)
    bridge_uuid = models.TextField(null=True)
    read_codec = models.TextField(null=True)
    read_rate = models.TextField(null=True)
    write_codec = models.TextField(null=True)
    write_rate = models.TextField(null=True)
    remote_media_ip = models.TextField(null=True)
    network_addr = models.TextField(null=True)
    record_path = models.TextField(null=True)
    record_name = models.TextField(null=True)
    leg = models.CharField(max_length=1, null=True)
    originating_leg_uuid = models.UUIDField(null=True)
    pdd_ms = models.BigIntegerField(null=True)
    rtp_audio_in_mos = models.DecimalField(max_digits=6, decimal_places=2, null=True)
    last_app = models.TextField(null=True)
    last_arg = models.TextField(null=True)
    voicemail_message = models.BooleanField(null=True)
    missed_call = models.BooleanField(null=True)
    call_center_queue_uuid = models.UUIDField(null=True)
    cc_side = models.TextField(null=True)
    cc_member_uuid = models.UUIDField(null=True)
    cc_queue_joined_epoch = models.BigIntegerField(null=True)
    cc_queue = models.TextField(null=True)
    cc_member_session_uuid = models.UUIDField(null=True)
    cc_agent_uuid = models.UUIDField(null=True)
    cc_agent = models.TextField(null=True)
    cc_agent_type = models.TextField(null=True)
    cc_agent_bridged = models.TextField(null=True)
    cc_queue_answered_epoch = models.BigIntegerField(null=True)
    cc_queue_terminated_epoch = models.BigIntegerField(null=True)
    cc_queue_canceled_epoch = models.BigIntegerField(null=True)
    cc_cancel_reason = models.TextField(null=True)
    cc_cause = models.TextField(null=True)
    waitsec = models.BigIntegerField(null=True)
    conference_name = models.TextField(null=True)
    conference_uuid = models.UUIDField(null=True)
    conference_member_id = models.TextField(null=True)
    digits_dialed = models.TextField(null=True)
    pin_number = models.TextField(null=True)
    hangup_cause = models.TextField(null=True)
    hangup_cause_q850 = models.BigIntegerField(null=True)
    sip_hangup_disposition = models.TextField(null=True)
    xml = models.TextField(null=True)

    class Meta:
        app_label = "calls"
        managed = False
        db_table = "v_xml_cdr"


class Holder:
    """Who holds a token."""

    is_authenticated = True


class TokenAuthentication(authentication.BaseAuthentication):
    def authenticate(self, request):
        digest = hashlib.sha256(authentication.get_authorization_header(request).partition(b" ")[2]).digest()
        query = os.environ["BENCH_TOKEN_QUERY"]
        values = [digest, request.query_params["domain_name"]][: query.count("%s")]
        with connection.cursor() as cursor:
            cursor.execute(query, values)
            if not cursor.fetchone():
                raise exceptions.AuthenticationFailed
        return Holder(), None

    def authenticate_header(self, _request):
        return "Bearer"


class CallSerializer(serializers.ModelSerializer):
    class Meta:
        model = Call
        fields = os.environ["BENCH_COLUMNS"].split(", ")


class CallList(generics.ListAPIView):
    authentication_classes = (TokenAuthentication,)
    permission_classes = (permissions.IsAuthenticated,)
    serializer_class = CallSerializer

    def list(self, request):
        if not os.environ["BENCH_BEGIN"]:
            return super().list(request)
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            return super().list(request)

    def get_queryset(self):
        values = self.request.query_params
        start, end = (datetime.fromtimestamp(int(values[name]), UTC) for name in ("from", "to"))
        domain_uuid = UUID(hashlib.md5(f"domain {values['domain_name']}".encode()).hexdigest())  # as demo makes it
        calls = Call.objects.filter(domain_uuid=domain_uuid, end_stamp__gte=start)
        return calls.filter(end_stamp__lt=end + timedelta(seconds=1)).order_by("end_stamp", "xml_cdr_uuid")


urlpatterns = [path("call_range", CallList.as_view())]
app = get_wsgi_application()
