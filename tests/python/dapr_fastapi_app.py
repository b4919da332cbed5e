"""Subscribes by the SDK's FastAPI extension, and can be invoked."""

import os

import uvicorn
from dapr.ext.fastapi import DaprApp
from fastapi import Body, FastAPI, Request, Response

import story

app = FastAPI()
dapr_app = DaprApp(app)


@dapr_app.subscribe(pubsub='default', topic=story.TOPIC, route='/placed', dead_letter_topic=story.DEAD)
def placed(event=Body()):
    extra = {'id': event['id'], 'note': event.get('note')}
    return {'status': story.verdict(event['topic'], event['data']['text'], **extra).upper()}


@dapr_app.subscribe(pubsub='default', topic=story.DEAD, route='/dead')
def dead(event=Body()):
    return {'status': story.verdict(story.DEAD, event['data']['text'], id=event['id']).upper()}


@app.post('/hello')
async def hello(request: Request, response: Response):
    response.headers['x-answer'] = 'yes'
    body = await request.body()
    return {
        'said': body.decode(),
        'type': request.headers.get('content-type'),
        'query': str(request.query_params),
        'note': request.headers.get('x-note'),
    }


@app.get('/missing-thing')
def missing_thing():
    return Response(status_code=409, content='taken')


uvicorn.run(app, host='127.0.0.1', port=int(os.environ['APP_PORT']), log_level='info')
