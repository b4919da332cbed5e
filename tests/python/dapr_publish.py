"""Publishes in every way that the SDK has, and writes down what came of it."""

import json

from dapr.clients import BulkPublishEntry, DaprClient
from dapr.clients.exceptions import DaprGrpcError

import story


def refused(name, publish):
    try:
        publish()
        story.note(refused=name, code=None)
    except DaprGrpcError as error:
        story.note(refused=name, code=error.code().name, text=error.details())


with DaprClient() as client:
    send = client.publish_event
    send('default', 'news', json.dumps({'n': 1}), data_content_type='application/json')
    send('default', 'news', b'\x00\xff', data_content_type='application/octet-stream')
    send('default', 'news', 'text')
    event = {'specversion': '1.0', 'id': 'own', 'source': '/own', 'type': 'own.type', 'data': {'n': 2}}
    send('default', 'news', json.dumps(event), data_content_type='application/cloudevents+json')
    metadata = {'partitionKey': 'k', 'ttlInSeconds': '600', 'cloudevent.id': 'named'}
    send('default', 'news', '{}', data_content_type='application/json', publish_metadata=metadata)
    send('default', 'news', json.dumps(event), publish_metadata={'rawPayload': 'true'},
         data_content_type='application/cloudevents+json')
    # As the SDK for .NET makes it of a CloudEvent<T>.
    net = {'data': {'n': 4}, 'source': 'urn:net', 'type': 'net.type', 'datacontenttype': 'application/json', 'subject': None}
    send('default', 'news', json.dumps(net), data_content_type='application/cloudevents+json')
    bulk = client.publish_events('default', 'news', ['b1', 'b2'], data_content_type='text/plain')
    story.note(failed=[entry.entry_id for entry in bulk.failed_entries])
    entries = [
        BulkPublishEntry(event='{"n": 3}', content_type='application/json', metadata={'cloudevent.id': 'b3'}),
        BulkPublishEntry(event='{"type": "net.bulk"}', content_type='application/cloudevents+json', entry_id='net'),
        BulkPublishEntry(event='{', content_type='application/cloudevents+json', entry_id='broken'),
    ]
    bulk = client.publish_events('default', 'news', entries)
    story.note(failed=[entry.entry_id for entry in bulk.failed_entries])
    refused('bus', lambda: send('nowhere', 'news', 'x'))
    refused('topic', lambda: send('default', 'two words', 'x'))
    old = json.dumps({'specversion': '0.3'})
    refused('envelope', lambda: send('default', 'news', old, data_content_type='application/cloudevents+json'))
    refused('metadata', lambda: send('default', 'news', 'x', publish_metadata={'ttlInSeconds': 'soon'}))
    refused('bulk', lambda: client.publish_events('nowhere', 'news', ['x']))
    client.set_metadata('team', 'blue')
    metadata = client.get_metadata()
    story.note(
        id=metadata.application_id,
        components=[component.name for component in metadata.registered_components],
        extended=metadata.extended_metadata,
    )
    try:
        client.get_state('store', 'key')
    except Exception as error:  # whatever the SDK makes of UNIMPLEMENTED
        story.note(state=str(error))
    story.note(done=True)
