"""Invokes two services, over HTTP and over gRPC, and by gRPC's own methods through the sidecar."""

import os

import grpc
from dapr.clients import DaprClient
from dapr.conf import settings
from dapr.proto import appcallback_service_v1
from google.protobuf.empty_pb2 import Empty

import story


def call(name, work):
    try:
        story.note(call=name, **work())
    except grpc.RpcError as error:
        story.note(call=name, code=error.code().name, text=error.details())
    except Exception as error:  # the HTTP client's own
        story.note(call=name, error=str(error))


def hello(client, service):
    def work():
        answer = client.invoke_method(
            service, 'hello', 'hi', content_type='text/plain', http_verb='POST',
            http_querystring=(('q', '1'),), metadata=(('x-note', 'kept'),),
        )
        headers = {key.lower(): value for key, value in dict(answer.headers).items()}
        header = headers.get('x-answer')
        return {'text': answer.text(), 'header': header[0] if isinstance(header, list) else header}

    return work


for protocol in ('http', 'grpc'):
    settings.DAPR_API_METHOD_INVOCATION_PROTOCOL = protocol
    with DaprClient() as client:
        for service in ('web', 'callback'):
            call(f'{protocol} {service}', hello(client, service))
        for service, method in (('web', 'missing-thing'), ('callback', 'nothing'), ('nobody', 'x')):
            invoke = lambda: {'text': client.invoke_method(service, method, '', http_verb='GET').text()}
            call(f'{protocol} {service} {method}', invoke)

channel = grpc.insecure_channel(f'127.0.0.1:{os.environ["DAPR_GRPC_PORT"]}')
health = appcallback_service_v1.AppCallbackHealthCheckStub(channel)
for service in ('callback', 'nobody'):
    metadata = (('dapr-app-id', service),)
    call(f'proxied {service}', lambda: {'text': str(health.HealthCheck(Empty(), metadata=metadata, timeout=20))})
story.note(done=True)
